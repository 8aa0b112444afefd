/* Rates of register tiles on one core: f32, int8 products by vpmaddwd, 4-bit ones by vpmaddubsw, and
   7-bit rows times int8 codes by vpmaddubsw, widened at every product or once in 64 (blocks.c).

       gcc -O3 -mavx2 -mfma benchmarks/integer_units.c -o /tmp/units && /tmp/units

   Upper bounds of a GEMM of that kind on a processor without VNNI: operands lie packed in the
   first-level cache, nothing else is counted. */
#include <immintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static double now(){struct timespec t;clock_gettime(CLOCK_MONOTONIC,&t);return t.tv_sec+1e-9*t.tv_nsec;}
/* MR=6 rows, 16 cols: a: [K/2][6] int32 pairs ; b: [K/2][16][2] int16 */
__attribute__((noinline,noipa)) void mk16(long k2,const int32_t*a,const int16_t*b,int32_t*c){
  __m256i acc[6][2];
  for(int i=0;i<6;i++)acc[i][0]=acc[i][1]=_mm256_setzero_si256();
  for(long k=0;k<k2;k++){
    __m256i b0=_mm256_load_si256((const __m256i*)(b+k*32)),b1=_mm256_load_si256((const __m256i*)(b+k*32+16));
    #pragma GCC unroll 6
    for(int i=0;i<6;i++){__m256i v=_mm256_set1_epi32(a[k*6+i]);
      acc[i][0]=_mm256_add_epi32(acc[i][0],_mm256_madd_epi16(v,b0));
      acc[i][1]=_mm256_add_epi32(acc[i][1],_mm256_madd_epi16(v,b1));}
  }
  for(int i=0;i<6;i++){_mm256_storeu_si256((__m256i*)(c+i*16),acc[i][0]);_mm256_storeu_si256((__m256i*)(c+i*16+8),acc[i][1]);}
}
/* int4 weights: u8 activations (4 k per int32), s8 weights [K/4][16][4], steps int16 pairs [K/32][16][2] */
__attribute__((noinline,noipa)) void mk4(long groups,const int32_t*a,const int8_t*b,const int16_t*s,int32_t*c){
  __m256i acc[4][2];
  for(int i=0;i<4;i++)acc[i][0]=acc[i][1]=_mm256_setzero_si256();
  for(long g=0;g<groups;g++){
    __m256i t[4][2];
    #pragma GCC unroll 4
    for(int i=0;i<4;i++)t[i][0]=t[i][1]=_mm256_setzero_si256();
    for(int k=0;k<8;k++){
      __m256i b0=_mm256_load_si256((const __m256i*)b),b1=_mm256_load_si256((const __m256i*)(b+32)); b+=64;
      #pragma GCC unroll 4
      for(int i=0;i<4;i++){__m256i v=_mm256_set1_epi32(a[i]);
        t[i][0]=_mm256_add_epi16(t[i][0],_mm256_maddubs_epi16(v,b0));
        t[i][1]=_mm256_add_epi16(t[i][1],_mm256_maddubs_epi16(v,b1));}
      a+=4;
    }
    __m256i s0=_mm256_load_si256((const __m256i*)s),s1=_mm256_load_si256((const __m256i*)(s+16)); s+=32;
    #pragma GCC unroll 4
    for(int i=0;i<4;i++){acc[i][0]=_mm256_add_epi32(acc[i][0],_mm256_madd_epi16(t[i][0],s0));acc[i][1]=_mm256_add_epi32(acc[i][1],_mm256_madd_epi16(t[i][1],s1));}
  }
  for(int i=0;i<4;i++){_mm256_storeu_si256((__m256i*)(c+i*16),acc[i][0]);_mm256_storeu_si256((__m256i*)(c+i*16+8),acc[i][1]);}
}
/* u8 rows (4 k per int32), s8 codes [K/4][16][4]: every product widened by a multiplication by ones */
__attribute__((noinline,noipa)) void mk7(long quads,const int32_t*a,const int8_t*b,int32_t*c){
  __m256i acc[6][2],ones=_mm256_set1_epi16(1);
  for(int i=0;i<6;i++)acc[i][0]=acc[i][1]=_mm256_setzero_si256();
  for(long q=0;q<quads;q++,b+=64){
    __m256i b0=_mm256_load_si256((const __m256i*)b),b1=_mm256_load_si256((const __m256i*)(b+32));
    #pragma GCC unroll 6
    for(int i=0;i<6;i++){__m256i v=_mm256_set1_epi32(a[q*6+i]);
      acc[i][0]=_mm256_add_epi32(acc[i][0],_mm256_madd_epi16(_mm256_maddubs_epi16(v,b0),ones));
      acc[i][1]=_mm256_add_epi32(acc[i][1],_mm256_madd_epi16(_mm256_maddubs_epi16(v,b1),ones));}
  }
  for(int i=0;i<6;i++){_mm256_storeu_si256((__m256i*)(c+i*16),acc[i][0]);_mm256_storeu_si256((__m256i*)(c+i*16+8),acc[i][1]);}
}
/* the same summed in 16 bits over blocks of 64, then widened and scaled to f32 */
__attribute__((noinline,noipa)) void mkb(long blocks,const int32_t*a,const int8_t*b,const float*s,float*c){
  __m256 sum[3][2];const __m256i ones=_mm256_set1_epi16(1);
  #pragma GCC unroll 3
  for(int i=0;i<3;i++)sum[i][0]=sum[i][1]=_mm256_setzero_ps();
  for(long g=0;g<blocks;g++){
    __m256i part[3][2],v,p;
    #pragma GCC unroll 3
    for(int i=0;i<3;i++)part[i][0]=part[i][1]=_mm256_setzero_si256();
    for(int q=0;q<16;q++,b+=64,a+=3)
      #pragma GCC unroll 3
      for(int i=0;i<3;i++){
        __asm__ volatile("vpbroadcastd %1,%0":"=x"(v):"m"(a[i]));
        #pragma GCC unroll 2
        for(int h=0;h<2;h++)__asm__ volatile("vpmaddubsw %3,%2,%0\n\tvpaddw %0,%1,%1":"=&x"(p),"+x"(part[i][h]):"x"(v),"m"(*(const __m256i*)(b+32*h)));
      }
    #pragma GCC unroll 3
    for(int i=0;i<3;i++)
      #pragma GCC unroll 2
      for(int h=0;h<2;h++)sum[i][h]=_mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_madd_epi16(part[i][h],ones)),_mm256_set1_ps(s[g*3+i]),sum[i][h]);
  }
  #pragma GCC unroll 3
  for(int i=0;i<3;i++){_mm256_storeu_ps(c+i*16,sum[i][0]);_mm256_storeu_ps(c+i*16+8,sum[i][1]);}
}
__attribute__((noinline,noipa)) void mkf(long k,const float*a,const float*b,float*c){
  __m256 acc[6][2];
  for(int i=0;i<6;i++)acc[i][0]=acc[i][1]=_mm256_setzero_ps();
  for(long q=0;q<k;q++){
    __m256 b0=_mm256_load_ps(b+q*16),b1=_mm256_load_ps(b+q*16+8);
    #pragma GCC unroll 6
    for(int i=0;i<6;i++){__m256 v=_mm256_set1_ps(a[q*6+i]);
      acc[i][0]=_mm256_fmadd_ps(v,b0,acc[i][0]);acc[i][1]=_mm256_fmadd_ps(v,b1,acc[i][1]);}
  }
  for(int i=0;i<6;i++){_mm256_storeu_ps(c+i*16,acc[i][0]);_mm256_storeu_ps(c+i*16+8,acc[i][1]);}
}
int main(){
  long K=576; void*a=aligned_alloc(64,1<<20),*b=aligned_alloc(64,1<<20),*c=aligned_alloc(64,4096),*s=aligned_alloc(64,1<<16);
  for(int i=0;i<1<<20;i++){((char*)a)[i]=1;((char*)b)[i]=1;}
  for(int i=0;i<1<<16;i++)((char*)s)[i]=1;
  for(int r=0;r<3;r++){
  int R=100000; double t=now(); for(int i=0;i<R;i++)mk16(K/2,a,b,c); t=now()-t; printf("maddwd 6x16 %.1f GOP/s\n",2.0*6*16*K*R/t/1e9);
  t=now(); for(int i=0;i<R;i++)mk4(K/32,a,b,s,c); t=now()-t; printf("int4 4x16 %.1f GOP/s\n",2.0*4*16*K*R/t/1e9);
  t=now(); for(int i=0;i<R;i++)mk7(K/4,a,b,c); t=now()-t; printf("7-bit rows, widened each time, 6x16 %.1f GOP/s\n",2.0*6*16*K*R/t/1e9);
  t=now(); for(int i=0;i<R;i++)mkb(K/64,a,b,s,c); t=now()-t; printf("7-bit rows, widened once a block, 3x16 %.1f GOP/s\n",2.0*3*16*K*R/t/1e9);
  t=now(); for(int i=0;i<R;i++)mkf(K,a,b,c); t=now()-t; printf("f32 6x16 %.1f GFLOP/s\n",2.0*6*16*K*R/t/1e9);}
}
